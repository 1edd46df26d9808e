"""What the tests of ownership in Redis share: real servers of every form, holders of blocks."""
