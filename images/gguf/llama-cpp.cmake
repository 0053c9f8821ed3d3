# What goes into the wheel of llama-cpp-python, and how it is compiled.
#
# CMake includes this right after llama.cpp's own project(); the Makefile and the Dockerfile name it
# in CMAKE_ARGS as -DCMAKE_PROJECT_llama.cpp_INCLUDE, with its absolute path. A plain variable is
# the only way in: llama-cpp-python sets the cache entry of LLAMA_BUILD_COMMON by force.

# The library behind the command-line tools: the Python bindings use none of it.
set(LLAMA_BUILD_COMMON OFF)

# libllama (a hundred and fifty model graphs, the tokenizers) holds no arithmetic of its own: it is
# compiled in large units and lightly optimised, which takes a third off the build. The kernels are
# in ggml and keep -O3.
function(tuneline_compile_llama_fast)
    set_target_properties(llama PROPERTIES UNITY_BUILD_BATCH_SIZE 40)
    target_compile_options(llama PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:-O1>")
endfunction()
cmake_language(DEFER CALL tuneline_compile_llama_fast)

# The converter from safetensors that belongs to this very llama.cpp; a stock wheel leaves it out,
# and what PyPI has of it is older. `tuneline.quantize` finds it beside the bindings.
install(
    FILES convert_hf_to_gguf.py LICENSE
    DESTINATION "${SKBUILD_PLATLIB_DIR}/llama_cpp/converter"
)
install(DIRECTORY conversion DESTINATION "${SKBUILD_PLATLIB_DIR}/llama_cpp/converter")
install(DIRECTORY gguf-py/gguf DESTINATION "${SKBUILD_PLATLIB_DIR}/llama_cpp/converter/gguf-py")
