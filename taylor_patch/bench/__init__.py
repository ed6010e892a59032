"""`taylor-patch bench`: time, error and memory of the backends on the machine at hand."""
