"""How masks begin: how many weights each layer gets, and where they lie."""
