"""Networks that we run ourselves, beside the host's own: what no backend of one product can do."""
