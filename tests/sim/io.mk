# Bytes moved, as a function of lengths and tiles: make -f tests/sim/Makefile io. Included by tests/sim/Makefile.
$(SIM_BUILD)/plain/io_sweep: tests/sim/io/sweep.cpp $(SIM_MODEL_OBJECTS_plain)
	@mkdir -p $(@D)
	$(CXX) $(SIM_CXXFLAGS) -O1 -g1 -MMD -MP -MF $@.d $< $(SIM_MODEL_OBJECTS_plain) $(SIM_LDFLAGS) -o $@
-include $(SIM_BUILD)/plain/io_sweep.d

.PHONY: io
io: $(SIM_BUILD)/plain/io_sweep
	@$<
