package services

import (
	"os"
	"path/filepath"
	"testing"
)

// The login of buckets, and their name and place.
const (
	KeyID  = "AKIAEROFSDTESTS"
	Secret = "s3cr3t-of-the-bucket"
	Bucket = "blobs"
	Region = "us-east-1"
)

// S3 starts versitygw over a new bucket with the files of dir below prefix.
func S3(t testing.TB, dir, prefix string) *Process {
	t.Helper()
	program := versitygw(t)
	root, addr := scratch(t), FreeAddr(t)
	at := filepath.Join(root, Bucket, filepath.FromSlash(prefix))
	if err := os.MkdirAll(at, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(at, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	return launch(t, addr, connects(addr), program, "--access", KeyID, "--secret", Secret, "--region", Region, "--port", addr, "--quiet", "posix", root)
}
