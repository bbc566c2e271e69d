"""What it costs: one JSON per device."""
