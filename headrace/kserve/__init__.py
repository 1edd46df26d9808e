"""Generated from protos/headrace/kserve: the Open Inference Protocol's messages."""
