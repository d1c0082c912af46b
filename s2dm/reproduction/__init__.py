"""The paper's experiments on its own data, from the published files to its tables, step by step."""
