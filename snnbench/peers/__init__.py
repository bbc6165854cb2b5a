"""The same spiking network in other libraries: equal spikes first, then timed side by side."""
