"""`python -m perpend` is `perpend`."""

import sys

from perpend.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
