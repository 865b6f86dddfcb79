"""The flow: units of row groups through Beam, committed by receipts."""
