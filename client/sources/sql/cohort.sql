-- The members of one cohort, once for each index date.
SELECT DISTINCT
    CAST(c.subject_id AS VARCHAR) AS patient,
    CAST(CAST(c.cohort_start_date AS DATE) AS VARCHAR) AS index_date
FROM cohort c
WHERE c.cohort_definition_id = {cohort}
