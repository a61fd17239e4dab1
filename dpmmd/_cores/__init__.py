"""The implementations of the operations, one module each, behind `protocol.Core`."""
