"""From records to answers: runs, groups over seeds, statistics, tables. Imports no torch."""
