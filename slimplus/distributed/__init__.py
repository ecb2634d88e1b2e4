"""The processes of a job: how they start, share work and tensors, train together, and end together."""
