"""What runs inside a sandbox: standard library only, started by file and never imported by a trainer."""
