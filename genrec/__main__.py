"""`python -m genrec` and `accelerate launch -m genrec`: the same command line as `genrec`."""

from genrec.cli import main

if __name__ == "__main__":
    main()
