"""sparsesearch: calibration -> Profile, search space -> candidates, device -> CostModel; ScoreTable -> search -> Plan -> apply -> report."""
