"""What commands share: flags to a run, its record, its failures in words."""
