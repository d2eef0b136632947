#!/bin/sh
# Runs nvcc (the arguments are its command line) and fails if ptxas reports what must not ship: register spills, local
# memory, serialised wgmma or a setmaxnreg it ignored. ptxas itself calls these information or warnings.
# What it says about each kernel stays beside the object, as <object>.ptxas.
object=
previous=
for argument in "$@"; do
  if [ "$previous" = "-o" ]; then object=$argument; fi
  previous=$argument
done
if [ -z "$object" ]; then exec "$@"; fi

log=$object.ptxas
"$@" 2>"$log"
code=$?
grep -v -E '^ptxas info|^ +[0-9]+ bytes stack frame|^ *$' "$log" >&2
if [ $code -ne 0 ]; then exit $code; fi

bad=$(awk '
  /Function properties for|Compiling entry function/ { kernel = $0 }
  /bytes stack frame/ && !/ 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads/ { print kernel; print $0 }
  /[Pp]otential [Pp]erformance [Ll]oss|wgmma.*serializ|setmaxnreg.*ignored/ { print $0 }
  /Local memory used for|Registers are spilled/ { print $0 }
' "$log")
if [ -n "$bad" ]; then
  printf 'error: %s: ptxas reports spills, local memory or serialised wgmma:\n%s\n' "$object" "$bad" >&2
  rm -f "$object"
  exit 1
fi
