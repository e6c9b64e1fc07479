"""The HDF5 table, the split by patient, and batches made from both."""
