"""Mixins over `transformers.Trainer` that know nothing of what is trained. The library's trainer comes last.

In this order, which is that of what they override: `Stoppable`, `FiniteSteps`, `Committed`, `SplitOnOom`, `PeftSteps`.
`RunTrainer` is all of them.
"""
