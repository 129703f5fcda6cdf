// Batch normalisation by oneDNN behind a C interface; bench/onednn.py compiles and calls it.
// Every function returns null or, on failure, a message that holds until the thread's next call.

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <exception>
#include <string>
#include <unordered_map>
#include <vector>

#include "oneapi/dnnl/dnnl.hpp"
#include "oneapi/dnnl/dnnl_debug.h"

// Declared by hand, and linked without -fopenmp, so that it resolves to the very OpenMP library
// oneDNN loads, whichever the compiler would have brought.
extern "C" void omp_set_num_threads(int);

namespace {

using namespace dnnl;
using Forward = batch_normalization_forward;
using Backward = batch_normalization_backward;
using Tag = memory::format_tag;
using Args = std::unordered_map<int, memory>;
constexpr auto f32 = memory::data_type::f32;

const std::vector<int>  // the first two in the order of onednn.py
    inputs = {DNNL_ARG_SRC, DNNL_ARG_DIFF_DST, DNNL_ARG_SCALE, DNNL_ARG_SHIFT},
    results = {DNNL_ARG_DST, DNNL_ARG_MEAN, DNNL_ARG_VARIANCE,
               DNNL_ARG_DIFF_SRC, DNNL_ARG_DIFF_SCALE, DNNL_ARG_DIFF_SHIFT},
    forward_args = {DNNL_ARG_SRC, DNNL_ARG_MEAN, DNNL_ARG_VARIANCE, DNNL_ARG_SCALE, DNNL_ARG_SHIFT,
                    DNNL_ARG_DST},
    backward_args = {DNNL_ARG_SRC, DNNL_ARG_MEAN, DNNL_ARG_VARIANCE, DNNL_ARG_SCALE,
                     DNNL_ARG_DIFF_DST, DNNL_ARG_DIFF_SRC, DNNL_ARG_DIFF_SCALE,
                     DNNL_ARG_DIFF_SHIFT};

Tag tag_of(int layout) {
    // A block is what the widest vectors of this machine hold; others get slower code.
    const bool avx512 = get_effective_cpu_isa() >= cpu_isa::avx512_core;
    const Tag tags[] = {Tag::nchw, avx512 ? Tag::nChw16c : Tag::nChw8c, Tag::nhwc};
    return tags[layout];
}

struct Case {
    Case(const int64_t *shape, int layout, int threads)
        : threads(threads), data(memory::dims(shape, shape + 4), f32, tag_of(layout)) {
        const memory::desc channels({shape[1]}, f32, Tag::a);
        for (const auto *names : {&inputs, &results})
            for (int arg : *names) args[arg] = allocate(channels);
        for (int arg : {DNNL_ARG_SRC, DNNL_ARG_DST, DNNL_ARG_DIFF_SRC, DNNL_ARG_DIFF_DST})
            args[arg] = allocate(data);
    }

    memory allocate(const memory::desc &desc) {
        const memory made(desc, engine);
        char *const bytes = static_cast<char *>(made.get_data_handle());
        const size_t size = desc.get_size(), skip = -reinterpret_cast<uintptr_t>(bytes) & 4095;
        // NumPy asks for huge pages from this size on; the comparison would be unfair without.
        if (size >= 1 << 22) madvise(bytes + skip, size - skip, MADV_HUGEPAGE);
        std::memset(bytes, 0, size);  // so that no run meets a page fault
        return made;
    }

    memory users(int arg, float *array) {  // a C-ordered array, for copying to or from arg
        return memory({args.at(arg).get_desc().get_dims(), f32, memory::dims{}}, engine, array);
    }

    void copy(const memory &from, const memory &to) {
        run(reorder(from, to), {{DNNL_ARG_FROM, from}, {DNNL_ARG_TO, to}});
    }

    void run(const primitive &what, const Args &on) {
        what.execute(stream, on);
        stream.wait();
    }

    void build(float eps) {
        for (Step &step : steps) step = {};  // should this fail, there is nothing to run
        primitive_attr attr;  // with a scratchpad of its own, no run has to look for memory
        attr.set_scratchpad_mode(scratchpad_mode::user);
        const auto affine = normalization_flags::use_scale | normalization_flags::use_shift;
        const Forward::primitive_desc forward(
            engine, prop_kind::forward_training, data, data, eps, affine, attr);
        const Backward::primitive_desc backward(
            engine, prop_kind::backward, data, data, data, eps, affine, forward, attr);
        const Forward::primitive_desc frozen(
            engine, prop_kind::forward_inference, data, data, eps,
            affine | normalization_flags::use_global_stats, attr);
        steps[0] = {Forward(forward), pick(forward_args, forward)};
        steps[1] = {Backward(backward), pick(backward_args, backward)};
        steps[2] = {Forward(frozen), pick(forward_args, frozen)};
    }

    Args pick(const std::vector<int> &names, const primitive_desc_base &desc) {
        Args picked = {{DNNL_ARG_SCRATCHPAD, memory(desc.scratchpad_desc(), engine)}};
        for (int arg : names) picked[arg] = args.at(arg);
        return picked;
    }

    struct Step { dnnl::primitive primitive; Args args; };
    int threads;
    dnnl::engine engine{dnnl::engine::kind::cpu, 0};
    dnnl::stream stream{engine};
    memory::desc data;
    Args args;
    Step steps[3];  // forward, backward, inference
};

template <class Body>
const char *guarded(int threads, Body body) {
    static thread_local std::string message;
    try {
        omp_set_num_threads(threads);  // building too: a primitive is built for a thread count
        body();
        return nullptr;
    } catch (const error &e) {
        message = std::string(e.message) + " (" + dnnl_status2str(e.status) + ")";
    } catch (const std::exception &e) {
        message = e.what();
    }
    return message.c_str();
}

}  // namespace

extern "C" {
const char *bn_create(Case **c, const int64_t *shape, int layout, int threads) {
    return guarded(threads, [&] { *c = new Case(shape, layout, threads); });
}
void bn_destroy(Case *c) { delete c; }

const char *bn_set(Case *c, float **arrays, float eps) {
    return guarded(c->threads, [&] {
        c->build(eps);
        for (int arg : inputs) c->copy(c->users(arg, *arrays++), c->args.at(arg));
    });
}

const char *bn_run(Case *c, int which) {
    return guarded(c->threads, [&] { c->run(c->steps[which].primitive, c->steps[which].args); });
}

const char *bn_get(Case *c, float **arrays) {
    return guarded(c->threads, [&] {
        for (int arg : results) c->copy(c->args.at(arg), c->users(arg, *arrays++));
    });
}
}
