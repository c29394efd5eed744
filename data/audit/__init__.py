"""Headers, near duplicates and matching of a data set; behind data.data_audit."""
