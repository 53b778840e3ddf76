#!/bin/sh
# check_isa_objects.sh OBJECT...: fails when an object of kernels/isa/ defines a weak function. The linker may keep any
# one copy of such a function, and it must not be one with instructions the machine lacks.
status=0
for object in "$@"; do
  case $object in
    */isa/*) if nm -C "$object" | grep ' [Wu] '; then echo "in $object"; status=1; fi ;;
  esac
done
exit $status
