"""`python -m lorafit`, the form `accelerate launch -m lorafit` needs."""

from lorafit.cli import main

if __name__ == "__main__":
    main()
