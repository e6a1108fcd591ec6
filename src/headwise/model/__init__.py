"""The one way into a model: sites, the interception, reads, edits, single and dual runs, the doctor."""
