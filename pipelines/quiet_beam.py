"""apache_beam, imported without its warning about Google packages that nothing here needs.

It is one line for the driver and one for each worker, on the screen of somebody who never heard of BigQuery.
"""

import logging

_before = logging.root.manager.disable
logging.disable(logging.WARNING)
try:
    import apache_beam as beam
finally:
    logging.disable(_before)

__all__ = ["beam"]
