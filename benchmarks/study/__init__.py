"""The papers' table: every way of encoding items in one trainer, by `python -m benchmarks study`.

`methods` says what is compared, `models` how each encodes items, `worlds` on which data and encoders;
`measure` times, weighs and trains one method; `run` does so for all; `table` draws what was recorded.
"""
