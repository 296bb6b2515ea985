"""Building blocks of the hosts: exact selection, integer budgets, maskable weights, optimizer state, packed steps."""
