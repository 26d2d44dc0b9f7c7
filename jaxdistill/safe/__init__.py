"""Files and processes that fail safely: whole files, strict JSON, checksums, redaction."""
