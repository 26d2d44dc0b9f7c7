"""`python -m jaxdistill`."""

import sys

from jaxdistill.cli import main

if __name__ == "__main__":
    sys.exit(main())
