//go:build nos3

package s3_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/erofsd/erofsd/backend/s3"
)

func TestLeftOut(t *testing.T) {
	_, err := s3.New(s3.Options{Region: "us-east-1", Bucket: "b"})
	if !errors.Is(err, errors.ErrUnsupported) || !strings.Contains(err.Error(), "nos3") {
		t.Errorf("error %v, want one that names the build tag", err)
	}
}
