# Finds a CUDA compiler: the machine's own, else the one in the NVIDIA wheels of the Python that
# builds. Sets FASTHYP_WITH_CUDA. FASTHYP_CUDA (environment or cache): auto (default), 1, 0.

set(_wanted "auto")
if(DEFINED FASTHYP_CUDA)
  set(_wanted "${FASTHYP_CUDA}")
elseif(DEFINED ENV{FASTHYP_CUDA})
  set(_wanted "$ENV{FASTHYP_CUDA}")
endif()
string(TOLOWER "${_wanted}" _wanted)
if(NOT _wanted MATCHES "^(auto|0|1|on|off|true|false|yes|no)$")
  message(FATAL_ERROR "FASTHYP_CUDA must be auto, 0 or 1, got '${_wanted}'")
endif()

set(FASTHYP_WITH_CUDA OFF)
if(NOT _wanted MATCHES "^(0|off|false|no)$")
  include(CheckLanguage)
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    # Wheels have bin/, include/, lib/ under nvidia/cu13, but no lib64 and no libcudart.so link, so
    # the compiler, its library path and the runtime must each be named.
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -c
              "import nvidia, pathlib; print(*[p for d in nvidia.__path__ for p in [pathlib.Path(d) / 'cu13'] if (p / 'bin' / 'nvcc').exists()][:1], end='')"
      OUTPUT_VARIABLE _wheel_root ERROR_QUIET)
    if(_wheel_root)
      # check_language left a normal variable NOTFOUND that would hide the cache entry.
      unset(CMAKE_CUDA_COMPILER)
      set(CMAKE_CUDA_COMPILER "${_wheel_root}/bin/nvcc" CACHE FILEPATH "" FORCE)
      set(CUDAToolkit_ROOT "${_wheel_root}" CACHE PATH "" FORCE)
      string(APPEND CMAKE_CUDA_FLAGS " -L${_wheel_root}/lib")
      file(GLOB _runtime "${_wheel_root}/lib/libcudart.so*")
      list(GET _runtime 0 _runtime)
      set(CUDA_CUDART "${_runtime}" CACHE FILEPATH "" FORCE)
    endif()
  endif()
  set(_found "no CUDA compiler was found")
  if(CMAKE_CUDA_COMPILER)
    execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --version OUTPUT_VARIABLE _version ERROR_QUIET)
    string(REGEX MATCH "release ([0-9.]+)" _version "${_version}")
    # 12.8 is the first that knows the newest of the default architectures.
    if(CMAKE_MATCH_1 VERSION_GREATER_EQUAL 12.8)
      set(FASTHYP_WITH_CUDA ON)
    else()
      set(_found "${CMAKE_CUDA_COMPILER} is release '${CMAKE_MATCH_1}'")
    endif()
  endif()
  if(NOT FASTHYP_WITH_CUDA)
    if(NOT _wanted STREQUAL "auto")
      message(FATAL_ERROR
        "FASTHYP_CUDA=${_wanted} asks for the CUDA kernels, but ${_found}. Put nvcc (CUDA 12.8 or newer) on PATH, "
        "set CUDACXX or CUDA_HOME, or install the compiler with: "
        "pip install \"cuda-toolkit[nvcc,cudart,cccl]==13.0.*\"")
    endif()
    message(STATUS "fasthyp: ${_found}")
  endif()
endif()
