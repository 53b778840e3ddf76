"""`python -m elutq` is the `elutq` command."""

from elutq.cli import main

if __name__ == "__main__":
    main()
