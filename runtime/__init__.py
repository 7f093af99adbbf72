"""What every script stands on: flags, errors, files, memory, several processes."""
