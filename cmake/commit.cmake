# Writes OUTPUT, a header that defines HSTU_COMMIT: what HSTU_OPS_COMMIT in the environment says, else the commit of the
# git work tree whose root SOURCE is, with "+dirty" where files differ from it (results of benches aside), else
# "unknown". Run at every build; the header changes only when the answer does.
#
# bench/report.py asks git the same for the tree it stands in.
cmake_minimum_required(VERSION 3.22)
set(commit "$ENV{HSTU_OPS_COMMIT}")
if(commit STREQUAL "")
  set(commit unknown)
  function(ask_git result)
    execute_process(
      COMMAND git -C "${SOURCE}" ${ARGN}
      RESULT_VARIABLE status OUTPUT_VARIABLE answer ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
    if(NOT status EQUAL 0)
      set(answer "")
    endif()
    set(${result} "${answer}" PARENT_SCOPE)
  endfunction()
  ask_git(root rev-parse --show-toplevel)
  get_filename_component(source "${SOURCE}" REALPATH)
  if(root STREQUAL source)
    ask_git(head rev-parse --short=12 HEAD)
    ask_git(changed status --porcelain -- . ":!bench/results")
    if(NOT head STREQUAL "")
      set(commit "${head}")
      if(NOT changed STREQUAL "")
        string(APPEND commit "+dirty")
      endif()
    endif()
  endif()
endif()
string(REGEX REPLACE "[^A-Za-z0-9+._-]" "" commit "${commit}")
file(CONFIGURE OUTPUT "${OUTPUT}" CONTENT "#define HSTU_COMMIT \"@commit@\"\n" @ONLY)
