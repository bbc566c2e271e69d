"""Families of plans at equal measured latency: what each keeps when all of them take the same time on the device at hand.

Equal budgets are not equal times: a cost model errs, and by different amounts for different rules. So every family is searched again and
again under a budget in predicted latency, its plan is timed beside dense and beside the other families' in the same rounds, and its budget is
moved until the measured time is the target's. Then all plans are judged on the same held-out sequences, and differences are paired.

All families are searched for the same objective (`mixture, answers` for one that weighs answers more), and heads are priced alike
(`unit_prices`), so that only the menu of rules differs. The first one, whose space contains the others', may choose among parts of it: the `menus`
and every other family's own space, by what calibration sequences say that were not profiled; what leads by more than the noise of that choice comes
first (`standings`). On the same sequences, steps may improve every family's plan (`steps`), the first one's after the others' (`improve`).
Where no plan of a family comes within the tolerance (windows and head groups come in steps), the first family gets its next faster plan and
every other family its next slower one.
"""
