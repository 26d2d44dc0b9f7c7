"""Our pieces beside other libraries', in turn, in one run; their environment is their own."""
