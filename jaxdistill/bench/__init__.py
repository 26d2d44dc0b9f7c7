"""What `jaxdistill bench` measures: our losses beside what others write, on the device at hand."""
