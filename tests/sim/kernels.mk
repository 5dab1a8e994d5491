# Kernels on the simulator, and the runner of cases: build/sim/<flavour>/run_case. Included by tests/sim/Makefile.
#
#   make -f tests/sim/Makefile cases       every case under three schedules
#   make -f tests/sim/Makefile sanitize    some under AddressSanitizer and UBSan, those with hostile lengths among them
#   make -f tests/sim/Makefile race        some under ThreadSanitizer
#   make -f tests/sim/Makefile mutants     breaks one line of the kernels at a time and says who notices
#   make -f tests/sim/Makefile debugger    run_case for a debugger: gdb --args build/sim/debug/run_case 'line of a case'
SIM_JOBS ?= $(shell nproc)

# The folders of architectures, and the head_dims of each: sm80.64 and so on.
SIM_ARCHS := $(patsubst csrc/cuda/%/backend.cpp,%,$(wildcard csrc/cuda/sm*/backend.cpp))
sim_head_dims = $(shell sed 's|//.*||' csrc/cuda/$(1)/head_dims.inl | tr -c '0-9' ' ')
SIM_KERNELS := $(patsubst csrc/cuda/%.cu,%,$(wildcard csrc/cuda/sm*/*.cu))
SIM_BACKENDS := backends $(SIM_ARCHS:%=%/backend)
SIM_RUNNER := case check_nonfinite check_other check_reference compare inputs io main reference run simulator tensors

# Element type and head_dim of the kernels that each flavour has: those of a kernel of an architecture, as $(1).
sim_instances = $(foreach element,$(2),$(patsubst %,$(element).%,$(call sim_head_dims,$(patsubst %/,%,$(dir $(1))))))
plain_INSTANCES = $(call sim_instances,$(1),bf16 fp16)
debug_INSTANCES = $(plain_INSTANCES)
tsan_INSTANCES  = $(call sim_instances,$(1),bf16)
asan_INSTANCES  = $(filter bf16.64 bf16.96 bf16.256,$(tsan_INSTANCES))

# There are many of them, and at -O1 they run as fast as at -O2: the time is spent in the models. Reports need the line
# numbers of -g1 only.
plain_INSTANCE_FLAGS := -O1 -g1
tsan_INSTANCE_FLAGS  := -O1 -g1
asan_INSTANCE_FLAGS  := -O1 -g1

# The runner is never instrumented: it is the models' memory that the race detector watches, and kernels and runner must
# not share instrumented templates of the standard library.
plain_RUNNER := plain
tsan_RUNNER  := plain
asan_RUNNER  := plain
debug_RUNNER := debug

# What a flavour leaves out is missing.o's, whose symbols are weak.
define sim_run_case
SIM_KERNEL_OBJECTS_$(1) := $$(foreach kernel,$$(SIM_KERNELS),\
    $$(patsubst %,$$(SIM_BUILD)/$(1)/kernels/$$(kernel).%.o,$$(call $(1)_INSTANCES,$$(kernel))))
SIM_BACKEND_OBJECTS_$(1) := $$(SIM_BACKENDS:%=$$(SIM_BUILD)/$(1)/kernels/%.o)
SIM_RUNNER_OBJECTS_$(1) := $$(SIM_RUNNER:%=$$(SIM_BUILD)/$$($(1)_RUNNER)/runner/%.o)

$$(SIM_BUILD)/$(1)/run_case: $$(SIM_RUNNER_OBJECTS_$(1)) $$(SIM_KERNEL_OBJECTS_$(1)) $$(SIM_BACKEND_OBJECTS_$(1)) \
    $$(SIM_MODEL_OBJECTS_$(1)) $$(SIM_ARCHS:%=$$(SIM_BUILD)/plain/runner/missing.%.o)
	$$(CXX) $$($(1)_LINK) $$(SIM_LDFLAGS) $$^ -o $$@

$$(SIM_BACKEND_OBJECTS_$(1)): $$(SIM_BUILD)/$(1)/kernels/%.o: csrc/cuda/%.cpp tests/sim/Makefile
	@mkdir -p $$(@D)
	$$(CXX) $$(SIM_CXXFLAGS) -DFLASH_ATTN_BACKEND_CODE='"simulator"' $$($(1)_KERNEL) -MMD -MP -c $$< -o $$@
endef

# $(1): flavour, $(2): kernel, $(3): element type and head_dim
define sim_instance
$$(SIM_BUILD)/$(1)/kernels/$(2).$(3).o: csrc/cuda/$(2).cu tests/sim/Makefile
	@mkdir -p $$(@D)
	$$(CXX) $$(SIM_CXXFLAGS) $$($(1)_KERNEL) $$($(1)_INSTANCE_FLAGS) $$(call sim_instance_flags,$(3)) -MMD -MP -x c++ -c $$< -o $$@
endef
sim_instance_flags = -DFA_ELEMENT=$(word 1,$(subst ., ,$(1))) -DFA_HEAD_DIM=$(word 2,$(subst ., ,$(1)))

$(foreach flavour,$(SIM_FLAVOURS),$(eval $(call sim_run_case,$(flavour))))
$(foreach flavour,$(SIM_FLAVOURS),$(foreach kernel,$(SIM_KERNELS),$(foreach instance,\
    $(call $(flavour)_INSTANCES,$(kernel)),$(eval $(call sim_instance,$(flavour),$(kernel),$(instance))))))

$(SIM_BUILD)/plain/runner/%.o: tests/sim/runner/%.cpp tests/sim/Makefile
	@mkdir -p $(@D)
	$(CXX) $(SIM_CXXFLAGS) $(SIM_MODEL_FLAGS) -g1 -MMD -MP -c $< -o $@
$(SIM_BUILD)/plain/runner/missing.sm%.o: tests/sim/runner/missing.cpp tests/sim/Makefile csrc/cuda/sm%/head_dims.inl
	@mkdir -p $(@D)
	$(CXX) $(SIM_CXXFLAGS) -DFA_ARCH=$* -DFA_HEAD_DIMS='"cuda/sm$*/head_dims.inl"' -MMD -MP -c $< -o $@
$(SIM_BUILD)/debug/runner/%.o: tests/sim/runner/%.cpp tests/sim/Makefile
	@mkdir -p $(@D)
	$(CXX) $(SIM_CXXFLAGS) -O0 -MMD -MP -c $< -o $@

# $(1): flavour, $(2): table of list_cases.py, $(3): arguments. One process per job, each with its share of the table.
define sim_run_table
@python3 tests/sim/list_cases.py --table $(2) >$(SIM_BUILD)/$(1)/$(2).txt; \
for shard in $$(seq 0 $$(($(SIM_JOBS) - 1))); do \
    { $(SIM_RUN_$(1)) $(SIM_BUILD)/$(1)/run_case --table $(SIM_BUILD)/$(1)/$(2).txt --shard $$shard/$(SIM_JOBS) $(3) \
        >$(SIM_BUILD)/$(1)/$(2).$$shard.log 2>&1 || echo "exit code $$?" >>$(SIM_BUILD)/$(1)/$(2).$$shard.log; } & \
done; \
wait; \
cat $(SIM_BUILD)/$(1)/$(2).*.log | grep -v ' ok [0-9.]* s$$'; \
! grep -q '^exit code' $(SIM_BUILD)/$(1)/$(2).*.log
endef

.PHONY: cases sanitize race debugger
cases: $(SIM_BUILD)/plain/run_case
	$(call sim_run_table,plain,all)
sanitize: $(SIM_BUILD)/asan/run_case
	$(call sim_run_table,asan,sanitize)
race: $(SIM_BUILD)/tsan/run_case
	$(call sim_run_table,tsan,race)
debugger: $(SIM_BUILD)/debug/run_case

# Most mutants fail in the first case: compiling them takes longer than running them.
plain_MUTANT := $(SIM_CXXFLAGS) -O0 -g0
tsan_MUTANT  := $(SIM_CXXFLAGS) $(tsan_KERNEL) $(tsan_INSTANCE_FLAGS)
sim_mutant_flags = --compile-$(1)='$($(1)_MUTANT)' --link-$(1)='$($(1)_LINK)' --run-$(1)='$(SIM_RUN_$(1))'

.PHONY: mutants
mutants: $(SIM_BUILD)/plain/run_case $(SIM_BUILD)/tsan/run_case
	python3 tests/sim/mutants.py --build $(SIM_BUILD) --cxx "$(CXX)" $(foreach flavour,plain tsan,\
	    $(call sim_mutant_flags,$(flavour))) $(ARGS)
