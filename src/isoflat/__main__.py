"""`python -m isoflat`."""

from isoflat.cli.main import run

if __name__ == "__main__":
    run()
