// Package localdisk is a backend over a disk, a block device or a file with the image of
// one, on which each blob is a partition of a GUID partition table (UEFI specification,
// section 5.3), or lies at a known offset.
//
// A partition holds the blob whose digest is the 32 hex digits of the partition's name
// and then the 32 of its GUID: neither has room for 64. In tables of the older kind, whose
// partitions have the type "basic data", the name is the first 32 digits and the GUID says
// nothing. Both are what nydus's tools write. Other partitions are left alone. A partition
// is whole sectors long: how long the blob in it is, the reference says.
//
// It never writes and runs no program. The table is untrusted input: read again whenever a
// blob is opened, so that a disk may be exchanged, and taken only when its checksums are
// right and no partition reaches over another or past the disk.
//
// Read [Options] first, then readTable. It holds no lock.
package localdisk
