"""From an operation to the backend that was chosen: called directly in eager runs, as custom operators in graphs."""
