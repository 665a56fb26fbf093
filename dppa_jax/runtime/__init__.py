"""What every job needs of the machine: files, signals, a journal, several processes, a mesh of devices, memory."""
