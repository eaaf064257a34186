"""What every other package may use: errors, command lines, files, progress. It imports no other package."""
