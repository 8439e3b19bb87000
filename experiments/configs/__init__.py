"""One config file per algorithm; each lists only what differs."""
