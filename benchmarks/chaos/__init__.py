"""The product's own commands under the faults of docs/faults.md.

    python -m benchmarks.chaos --short                some minutes, as the tests do it
    python -m benchmarks.chaos --long --out F         about an hour; make chaos writes chaos.md
    python -m benchmarks.chaos --rows 1,2,8 --out F   some rows

`stage` runs the commands, `rows` does the faults, `audit` compares what was found with the
invariants. What happens inside the product's processes (the witness and the fault points) is put
there from outside, by a `sitecustomize` in `inside/`: `faults` and `wraps`. Linux only.
"""
