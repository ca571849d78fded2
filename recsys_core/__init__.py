"""The domain library: functions over arrays, tables and bytes. Imports no other room."""
