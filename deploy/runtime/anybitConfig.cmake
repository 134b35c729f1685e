# What find_package(anybit) reads: anybit::anybit and anybit::static.
include(CMakeFindDependencyMacro)
find_dependency(Threads)
include("${CMAKE_CURRENT_LIST_DIR}/anybitTargets.cmake")
