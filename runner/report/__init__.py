"""Reports of Timelines: terminal tables and bars, Chrome traces, Gantt charts, comparisons."""
