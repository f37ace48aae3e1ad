"""`python -m mtl_optax.compare`, the same as `mtl-compare`."""

from mtl_optax.compare._command import main

if __name__ == "__main__":
    main()
