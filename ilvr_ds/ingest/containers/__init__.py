"""Where records lie: files, tars, tables and data set folders, read record by record."""
