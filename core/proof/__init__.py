"""The harness of the evidence: never a student's reading."""
